"""Count the instructions that the inner loops take per element, and compare with tests/data/instructions.json.

    python tests/instructions.py build/check/gcc/test_count [--write]
    python tests/instructions.py build/check/aarch64/test_count --cpu aarch64 [--write]    # by qemu

Times on a shared machine vary by more than a slip in a loop costs; these counts do not vary at all.  They depend on the
compiler: of one that the file does not have there is nothing to compare with.  --write records the counts, which is due
where a loop was changed on purpose.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parent / "data" / "instructions.json"
ISAS = ("baseline", "x86-64-v3")  # valgrind knows no AVX-512
FEW, MANY = 2, 12  # repeats; what the process needs itself drops out of the difference
ALLOWED = 1.02


def emulated(cpu, *command):
    """A program of another CPU, whose instructions qemu takes one by one."""
    emulator = f"qemu-{cpu}"
    known = subprocess.run([emulator, "--help"], capture_output=True, text=True).stdout
    one_by_one = "-one-insn-per-tb" if "-one-insn-per-tb" in known else "-singlestep"  # its name before qemu 8.1
    return [emulator, "-L", f"/usr/{cpu}-linux-gnu", one_by_one, "-d", "nochain,exec", *command]


def count(program, case, repeats, env, cpu=None):
    """Instructions of the whole process."""
    if cpu:  # a line for each
        with subprocess.Popen(emulated(cpu, program, case, str(repeats)), env=env, stderr=subprocess.PIPE) as process:
            return sum(1 for _ in process.stderr)
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, case, str(repeats)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return int(re.search(r"Collected : (\d+)", done.stderr)[1])


def counts(program, cpu=None):
    """The compiler, and instructions per element by instruction set and case; none of sets that the CPU lacks."""
    found, compiler = {}, ""
    few, many = (1, 2) if cpu else (FEW, MANY)
    for isa in ISAS:
        env = {**os.environ, "PYREG_ISA": isa}
        command = [f"qemu-{cpu}", "-L", f"/usr/{cpu}-linux-gnu"] if cpu else []
        listed = subprocess.run([*command, program, "list"], env=env, capture_output=True, text=True)
        if listed.returncode == 2:
            continue
        compiler, elements, *cases = listed.stdout.splitlines()
        for case in cases:
            extra = count(program, case, many, env, cpu) - count(program, case, few, env, cpu)
            found[f"{isa} {case}"] = round(extra / (many - few) / int(elements), 3)
    return f"{compiler} for {cpu}" if cpu else compiler, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--cpu", help="of which the program is, as qemu calls it")
    parser.add_argument("--write", action="store_true", help="record the counts")
    args = parser.parse_args()
    compiler, found = counts(args.program, args.cpu)
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    before = known.get(compiler, {})
    for case, now in found.items():
        then = f"  {now / before[case]:6.3f} of {before[case]}" if case in before else ""
        print(f"{case:<34} {now:8.3f} instructions per element{then}")
    if args.write:
        FILE.write_text(json.dumps({**known, compiler: {**before, **found}}, indent=1, sort_keys=True) + "\n")
    elif not before:
        print(f"nothing to compare with: {FILE.name} has no counts of {compiler}")
    elif more := [case for case, now in found.items() if now > ALLOWED * before.get(case, 0)]:
        sys.exit(f"more instructions than recorded: {', '.join(more)}")


if __name__ == "__main__":
    main()
