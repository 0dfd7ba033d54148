"""As `python -c` in some folder, with zinf in the folder of the first argument: asks this machine for its version."""

from __future__ import annotations

import sys

sys.path.insert(0, "")
sys.path.append(sys.argv[1])

from zinf_cli.search_path import leave_out_working_directory, module_command

leave_out_working_directory()

from zinf_cli.launch.connection import Lifelines  # noqa: E402
from zinf_cli.launch.pipes import Pipes  # noqa: E402
from zinf_cli.recipe.hosts import this_machine  # noqa: E402

with Lifelines(Pipes()) as lifelines:
    done = lifelines.connect(this_machine(1)).capture(module_command("zinf_cli.version"), within=20)
    print(done["code"], done["errors"])
