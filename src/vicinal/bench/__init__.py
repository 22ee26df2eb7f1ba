"""One benchmark harness for every suite: named problems, correctness first, peers in the same run."""
