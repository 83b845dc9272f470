"""Lets torchvision be imported beside a torch without CUDA.

The wheel of torchvision on PyPI is built for CUDA. Beside a CPU build of torch its C library does not load, so two
operators that its Python code registers fakes for do not exist, and the import fails. SGLang imports torchvision for
multimodal models, in every process. This module is imported at start-up through a `.pth` file, and defines the two
just before torchvision is imported; a machine with the right torchvision does not need it.
"""

import importlib.abc
import importlib.machinery
import sys

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for name in ("torchvision::nms", "torchvision::qnms"):
                    torch.library.define(name, _SCHEMA)
        # the ordinary finders find it


sys.meta_path.insert(0, _BeforeTorchvision())
