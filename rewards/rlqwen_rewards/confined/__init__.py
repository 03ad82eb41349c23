"""Run a completion's code and a dataset's tests, each in a confined process of its own.

The folder is a program, `python confined ROLE MEMORY_BYTES CPU_SECONDS FILE_DESCRIPTORS...`, and the only part of the
package that a confined process can read, so its modules import each other and Python's own.
"""
