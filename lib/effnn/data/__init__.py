"""Texts, corpora and images; README.md says what is where."""
