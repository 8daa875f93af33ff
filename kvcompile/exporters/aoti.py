"""Exporter `aoti`: ahead-of-time compiled packages (AOTInductor), for Python and for C++ without Python."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.exporters.programs import SHAPES, ProgramDoor

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from kvcompile.plan.plan import Plan

USAGE = f"""\
`prefill.pt2` and `decode.pt2` are native code with the weights inside. The caller holds the cache: a prefill gives it
after the logits, a decode changes it in place.

```python
import torch


def generate(folder, prompt, count):
    # prompt [1, T], int64; yields count tokens [1, 1], greedily
    prefill, decode = (torch._inductor.aoti_load_package(f"{{folder}}/{{name}}.pt2") for name in ("prefill", "decode"))
    with torch.no_grad():
        logits, *cache = prefill(prompt)
        for _ in range(count):
            token = logits[:, -1].argmax(-1, keepdim=True)
            yield token
            logits = decode(token, *cache)
```

From C++, linked with `-ltorch -ltorch_cpu -lc10` (headers and libraries are in the folder of the `torch` package):

```cpp
// step FOLDER COUNT TOKEN...: prints COUNT tokens after the prompt, chosen greedily.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {{
  c10::InferenceMode guard;
  const std::string folder = argv[1];
  torch::inductor::AOTIModelPackageLoader prefill(folder + "/prefill.pt2"), decode(folder + "/decode.pt2");

  std::vector<int64_t> prompt;
  for (int i = 3; i < argc; ++i) prompt.push_back(std::atoll(argv[i]));
  auto ids = at::tensor(prompt, at::kLong).unsqueeze(0);

  auto given = prefill.run({{ids}});  // the logits, then the cache
  auto logits = given[0];
  for (int left = std::atoi(argv[2]); left > 0; --left) {{
    given[0] = logits.argmax(-1);  // [1, 1]
    std::cout << given[0].item<int64_t>() << std::endl;
    logits = decode.run(given)[0];
  }}
}}
```

{SHAPES}"""


@dataclass(frozen=True)
class AOTI(ProgramDoor):
    """Programs that are handed the cache: `prefill(ids) -> (logits, *cache)`, `decode(ids, *cache) -> logits`."""

    name: ClassVar[str] = "aoti"
    summary: ClassVar[str] = "native code of prefill and decode (AOTInductor), run from Python or C++"
    usage: ClassVar[str] = USAGE
    cache: ClassVar[Literal["resident", "handed"]] = "handed"

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """As the base, and where there is no C++ compiler."""
        super().refuse(plan, model_config)
        compiler = os.environ.get("CXX", "g++")  # as AOTInductor looks for it
        if shutil.which(compiler) is None:
            raise KvcompileError("AOTInductor needs a C++ compiler", f"no {compiler}", "install g++, or set CXX")

    def save(self, traced: ExportedProgram, path: Path) -> None:
        """Compile it. Raises KvcompileError where Inductor cannot."""
        from torch._inductor import aoti_compile_and_package

        from kvcompile.exporters.static.modules import traceable

        with traceable(traced.graph_module):
            aoti_compile_and_package(traced, package_path=str(path))
