"""Adaptation: durable finetuning jobs on the parallel core, whose results are verified and served when they end."""
