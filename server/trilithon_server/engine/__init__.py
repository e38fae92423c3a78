"""The engine: scheduler, paged KV cache, sampler, leader, ranks and their supervisor."""
