"""What the numbers of a validation mean: pure functions of gold and predicted. No torch. All values are from 0 to 1."""
