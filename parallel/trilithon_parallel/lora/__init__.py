"""Low-rank adapters: what one is (`spec`), its files (`peft`), how it is trained (`adapter`, `training`)."""
