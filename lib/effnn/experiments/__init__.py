"""What the notebooks run, one folder per notebook; README.md says what is where."""
