"""The help text of a command with many options: in groups instead of as one list."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

# The options of each command by what they are about, as they are written on the command line.
GROUPS = {
    "chat": {
        "Basics": "--image --video --model --continue --system --help",
        "Pictures and video": "--detail --fps --max-frames --start --end --sample --chunk --frames",
        "Answer": "--max-tokens --temperature --top-p --seed --stop --schema --regex --draft",
        "Model": "--bits --adapter --offline",
        "Memory": "--memory-limit --kv-bits --max-kv-tokens --cache-dir --on-full",
        "Output": "--json --stats --plain --no-images",
    },
    "choose": {
        "Basics": "--choice --image --video --model --system --help",
        "Pictures and answers": "--detail --normalize",
        "Model": "--bits --adapter --offline",
        "Memory": "--memory-limit --cache-dir",
        "Output": "--json",
    },
    "eval": {
        "Questions": "--metric --tasks --limit --max-tokens --detail --skip-bad --help",
        "Model": "--adapter --bits --memory-limit --offline",
        "Results": "--results --restart --show-errors --json --markdown",
    },
    "convert": {
        "Basics": "--bits --recipe --force --offline --help",
        "Precision of each part": "--vision-bits --connector-bits --embeddings-bits --group-size "
        "--mode --dtype",
        "Better than rounding": "--target-size --target-bits --gptq --dwq --dwq-steps "
        "--calibration",
        "Check": "--verify --verify-texts --verify-pictures",
        "Publish": "--upload --private",
    },
    "compare": {
        "What to compare on": "--texts --pictures --question --max-tokens --detail --data --limit",
        "Output and others": "--json --plot --offline --help",
    },
    "bench": {
        "What to measure": "--random --bits --tiles --prompt-tokens --max-tokens --repeat "
        "--memory-limit",
        "Other programs": "--against --peer-python --peer-blas",
        "Output and others": "--tune --work --json --png --offline --help",
    },
}


WIDEST_NAME = 30  # Click puts the text of a longer one on the next line


class GroupedCommand(TyperCommand):
    """A command whose help shows its options in the groups of `GROUPS`.

    Typer prints groups (`rich_help_panel`) only with rich, which is slow to import.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each group of options, all aligned with each other."""
        arguments, options = [], {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and parameter.param_type_name == "argument":
                arguments.append(record)
            elif record is not None:
                options[max(parameter.opts, key=len)] = record
        groups = GROUPS.get(self.name or "", {"Options": " ".join(options)})
        width = max(len(names) for names, _ in options.values() if len(names) <= WIDEST_NAME)
        sections = {
            title: [options[one] for one in names.split()] for title, names in groups.items()
        }
        for title, rows in {"Arguments": arguments, **sections}.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(names.ljust(width), text) for names, text in rows])
