"""``make bench``: runs all suites, keeps the result under the machine's name and the date, and writes the reports.

Arguments go to pytest: ``python -m benchmarks -k "info_nce and cpu"``.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def keep(found: Path, folder: Path) -> Path:
    """Store a result of pytest-benchmark as <device>-<date>.json, without the single samples; returns the new path."""
    run: dict[str, Any] = json.loads(found.read_text())
    for row in run["benchmarks"]:
        row["stats"].pop("data", None)
    path = folder / f"{run['machine_info']['fastssl']['slug']}-{run['datetime'][:10]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    return path


def main(arguments: list[str]) -> int:
    """Run pytest, then the reports; a part of the suites, or a failure, leaves README and page as they are."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "--benchmark-only", f"--benchmark-json={found}", "-q"]
        code = subprocess.run([*command, *arguments], cwd=HERE.parent, check=False).returncode
        if not found.exists() or not found.stat().st_size:
            return code or 1
        path = keep(found, RESULTS)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    if code or arguments:
        return code or report.main([str(path)])
    root = HERE.parent
    return report.main([str(path), "--readme", str(root / "README.md"), "--page", str(root / "docs/performance.md")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
