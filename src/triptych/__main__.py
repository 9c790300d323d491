"""`python -m triptych`, which is what torchrun starts."""

from triptych.cli import main

main()
