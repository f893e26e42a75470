"""HTTP: listening, limits, request bodies, error statuses and the published protocols."""
