"""Operations as ordinary functions: `fn(node, dry_run) -> Report`. CLI, admin endpoint and schedule call the same."""
