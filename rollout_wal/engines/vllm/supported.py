"""Importing this refuses another vLLM than the supported ones.

Imported before vLLM's own modules, of which another version may lack some: then the error names the range that is
supported, and not a module that nobody has heard of.
"""

from __future__ import annotations

from . import support

support.check()
