"""Use cases, one file per noun. They know neither HTTP nor paths of requests; adapters translate for them."""
