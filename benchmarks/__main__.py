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


def keep(found: Path, folder: Path, mark: str = "") -> Path:
    """Store a result of pytest-benchmark as <device>-<date><mark>.json; returns the new path."""
    run: dict[str, Any] = json.loads(found.read_text())
    for row in run["benchmarks"]:
        row["stats"]["data"] = [float(f"{seconds:.4g}") for seconds in row["stats"]["data"]]
    path = folder / f"{run['machine_info']['fastssl']['slug']}-{run['datetime'][:10]}{mark}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    return path


def main(arguments: list[str]) -> int:
    """Run pytest, then the reports. A part of the suites, or a failure, is kept apart from what the pages show."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "--benchmark-only", f"--benchmark-json={found}", "-q"]
        code = subprocess.run([*command, *arguments], cwd=HERE.parent, check=False).returncode
        if not found.exists() or not found.stat().st_size:
            return code or 1
        path = keep(found, RESULTS, "-part" if code or arguments else "")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    problem = report.main([str(path)])
    if code or arguments or problem:
        return code or problem
    pages = {"--readme": HERE.parent / "README.md", "--page": HERE.parent / "docs" / "performance.md"}
    slug = json.loads(path.read_text())["machine_info"]["fastssl"]["slug"]
    shown = {option: page for option, page in pages.items() if report.START.format(name=slug) in page.read_text()}
    for page in [page for option, page in pages.items() if option not in shown]:
        print(f"{page.name} shows other machines, and has no block for {slug}: left as it is")
    return report.main([str(path), *(str(word) for pair in shown.items() for word in pair)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
