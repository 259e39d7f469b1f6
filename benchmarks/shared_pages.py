"""Imported last by the server that processes are forked from: collections there no longer touch what they share."""

import gc

gc.collect()
gc.freeze()
