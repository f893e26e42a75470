"""Our HTTP client of a node: `remote` is a blob store on another machine, `operator` the CLI's way to a running server.

The only room that uses the HTTP client library.
"""
