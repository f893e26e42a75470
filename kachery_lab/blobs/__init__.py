"""Bytes on the attached volume.

`base` says what a blob store promises, `layout` builds every path, `receive` is the one way in, `local` keeps blobs in
files, `memory` in a dictionary (for tests), `files` are files open for reading, `links` those outside the store. `disk`
is the bounded pool in which all file work runs, `gather` lets short reads share its threads, `durable` is the one write
recipe, `journal` an append-only log, `volume` guards the directory.
"""
