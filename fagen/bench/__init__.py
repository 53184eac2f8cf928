"""The benchmark: rows that anyone can repeat, peers that are installed here, right before they are timed."""
