"""The entropy instruments run where torch is not, such as beside the rollout process or in tools."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_no_module_imports_torch():
    names = sorted(path.stem for path in (ROOT / "megatron_rlvr" / "entropy").glob("*.py") if path.stem != "__init__")
    assert "law" in names
    lines = [f"import megatron_rlvr.entropy.{name}" for name in names]
    program = "\n".join(["import sys", *lines, "sys.exit('torch' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0
