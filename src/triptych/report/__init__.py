"""What a run did, on one page: a self-contained HTML file that needs no server and no network."""
