"""The fronts of finetuning jobs and files, as an extension of the server. No torch."""
