"""Pictures of what an encoder sees: each kind is a function from encoder and images to arrays; drawing is apart."""
