"""What happens with tensors in front of and behind a collective: layout, reductions, pieces, sparse ones."""
