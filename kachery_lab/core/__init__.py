"""Pure rules: identifiers, hashes, canonical JSON, keys, signatures and signed logs.

Nothing here touches a disk, a socket, a clock or a database, so every function can be called from any thread and from
the event loop (only `hashing` and long lists of messages take noticeable time).

    strict_json     the one decoder for what clients send; what may be signed
    canonical_json  the 2021 dialect, RFC 8785, and the Python client's text form
    ids, uri        value types for names, and `sha1://` and `feed://` addresses
    hashing         SHA-1, SHA-256 and chunk hashes of a byte stream
    manifests       the list of chunks of a large blob
    keys            Ed25519 keys, and encryption under a key derived from one
    signables       every byte string that is signed here
    signatures      signing and verifying in the 2021 dialect
    feeds           signed messages, chains, rolling heads and checkpoints

Parsers take any bytes or any JSON value and raise nothing but `kachery_lab.errors`.
"""
