"""Training data: read strictly, judged whole, tokenised once, cut into batches by arithmetic. No torch."""
