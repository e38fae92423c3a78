"""Generated messages and stubs of the wire contract, by version."""
