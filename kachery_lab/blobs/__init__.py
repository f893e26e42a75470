"""Bytes on the attached volume.

`base` says what a blob store promises, `layout` builds every path, `receive` is the one way in, `local` keeps blobs in
files, `memory` in a dictionary (for tests), `disk` is the bounded pool in which all file work runs, `durable` the one
write recipe, `journal` an append-only log, `links` opens files outside the store, `volume` guards the directory.
"""
