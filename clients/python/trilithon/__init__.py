"""Client library and command for Trilithon servers."""
