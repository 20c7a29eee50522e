"""What the computations cost: `make bench` measures it and renews the numbers of the book's page."""
