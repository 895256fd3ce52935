"""`snakemake --lint` without its demand for a conda environment or container per rule, and for no ROOT in shell lines.

All rules run the installed package's own command, so one environment (environment.yml) serves them all. ROOT is in no
`params` of the rules whose results runs share: these go by `params`, and the root of generated scenes has a run's name.
"""

import re
import subprocess
import sys


def main() -> None:
    done = subprocess.run(["snakemake", "--lint"], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    place, kept, set_aside = "", [], 0
    for line in text.splitlines():
        if found := re.fullmatch(r"Lints for (.*):", line):
            place = found[1]
        elif line.startswith("    * "):
            if "conda environment or container" in line:
                set_aside += 1
            elif "uses variable ROOT" not in line:
                kept.append(f"{place}: {line[6:]}")
    if kept or not (set_aside or "Congratulations" in text):
        sys.exit("\n".join(kept) or text)
    print(f"snakemake --lint: nothing but the demand for an environment in each of {set_aside} rules")


if __name__ == "__main__":
    main()
