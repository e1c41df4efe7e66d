"""The tables of README.md: a function for each benchmark, from its result to Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def origin(key: str, file: str, result: dict[str, Any]) -> str:
    """Says what made a result: device, versions, load and command."""
    versions = result.get("versions") or result["provenance"]["versions"]
    device, command = key.partition(" on ")[2], result.get("command") or result["provenance"]["command"]
    words = command if isinstance(command, str) else f"python {' '.join(command)}"
    partial = "; partial: the run failed before its end" if result.get("partial") else ""
    return f"({device}, JAX {versions['jax']}; [{file}](results/{file}), from `{words}`{partial})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def peers(result: dict[str, Any]) -> str:
    """Ratios to the hand-written step; of the fastest rounds."""
    parts = []
    for kind in ("one step a dispatch", "many steps a dispatch"):
        measured = {key: each[kind] for key, each in result["results"].items()}
        names = list(dict.fromkeys(name for each in measured.values() for name in each if isinstance(each[name], dict)))
        rows = []
        for key, each in measured.items():
            base = each["hand-written"]["min_us"]
            cells = [f"{each[name]['ratio']:.2f}" if name in each else "" for name in names if name != "hand-written"]
            rows.append([key, f"{base:,.0f} us", *cells])
        parts.append(f"{kind[0].upper()}{kind[1:]}, time / hand-written, fastest of {result['rounds']} rounds:\n\n")
        parts.append(markdown(["", *(name for name in names)], rows) + "\n")
    loads = [each["load"][0] for each in result["results"].values()]
    parts.append(f"Load of the machine, processes that wanted a core: {min(loads):.1f} to {max(loads):.1f}.\n")
    return "".join(parts)


def start(result: dict[str, Any]) -> str:
    """Seconds from the shell, and as a ratio to the program by hand."""
    seconds = result["results"]["seconds"]
    rows = []
    for name, of in seconds.items():
        kind, _, rest = name.partition(", ")
        base = seconds.get(f"{kind}, hand-written, {rest.rpartition(', ')[2]}")
        ratios = [f"{of[what]['min'] / base[what]['min']:.2f}" if base else "" for what in ("wall", "processor")]
        rows.append([name, f"{of['wall']['min']:.2f} s", f"{of['processor']['min']:.2f} s", *ratios])
    header = ["from the shell", "wall", "processor", "wall / by hand", "processor / by hand"]
    loaded = f"Fastest of {result['rounds']} rounds; load {result['load'][0]}.\n"
    return f"{markdown(header, rows)}\n{loaded}"


def growth(result: dict[str, Any]) -> str:
    """The fitted exponents."""
    rows = []
    for kind, of in result["results"].items():
        for what in ("step", "start"):
            exponents, seconds = of[what]["exponent"], of[what]["seconds"]
            largest = of["compared"][-1]
            at = of["sizes"].index(largest)
            last = seconds["jaxmp"][at] / seconds["hand-written"][at]
            rows.append([f"{what}, {kind} {of['sizes'][0]} to {largest:,}"])
            rows[-1] += [f"{exponents['jaxmp']:.2f}", f"{exponents['hand-written']:.2f}", f"{last:.2f}"]
    return markdown(["", "exponent, jaxmp", "by hand", "time / by hand, at the largest"], rows)


def checkpoint(result: dict[str, Any]) -> str:
    """Seconds and GB/s of saving and restoring."""
    rows = [
        [f"{size} MB, {kind}"]
        + [
            f"{of[kind][name]['min']:.3f} s"
            + ("" if kind == "blocks" else f", {of[kind][name]['GB_per_second']:.2f} GB/s")
            for name in ("jaxmp", "Orbax")
        ]
        + [f"{of[kind]['ratio']:.2f}", f"{of[kind]['median_ratio']:.2f}"]
        for size, of in result["results"].items()
        for kind in ("blocks", "whole", "restore")
    ]
    return markdown(["", "jaxmp", "Orbax", "ratio of the fastest", "median ratio"], rows)


def pipeline(result: dict[str, Any]) -> str:
    """Examples a second of each reader."""
    rows = [
        [kind, name, f"{each['examples_per_second']:,.0f}", f"{each['examples_per_processor_second']:,.0f}"]
        for kind, of in result["results"].items()
        for name, each in of.items()
    ]
    table = markdown(["", "", "examples/s", "examples a second of processor time"], rows)
    return f"{table}\nFastest of {result['rounds']} rounds; load {result['load'][0]}.\n"


def scaling_cost(result: dict[str, Any]) -> str:
    """Kernels, selects and bytes of each model's program, and what a policy and the scaling add."""
    rows = []
    for model, of in result["results"].items():
        for name, program in of.items():
            base = of[program["beside"]] if program["beside"] else {}
            cells = [
                f"{program[key]:,}" + (f" ({program[key] / base[key] - 1:+.1%})" if base.get(key) else "")
                for key in ("kernels", "selects", "temporaries", "peak")
                if "why not" not in program
            ] or [f"not compiled: {textwrap.shorten(program['why not'], 60, placeholder=' ...')}", "", "", ""]
            rows.append([model, name, program["beside"] or "", *cells])
    return markdown(
        ["model", "step", "beside", "kernels", "selects", "bytes of temporaries", "bytes at the peak"], rows
    )


def gpu(result: dict[str, Any]) -> str:
    """Speed, MFU and memory of each model on a GPU; and the runs to an accuracy."""
    rows, reached = [], []
    for name, of in result["results"].items():
        found = of["result"]
        if "reached" in found:
            seconds = f"{found['seconds_after_compiling']:.1f} s" if found["reached"] else "not reached"
            reached.append([name, seconds, f"{found['validation_accuracy']:.2%}", found["steps"]])
            continue
        for contender, each in found.items():
            if not isinstance(each, dict):  # the FLOP/s of a product
                rows.append([name, contender, "", f"{each / 1e12:.1f}", "", "", "", ""])
                continue
            shares = ["" if each[key] is None else f"{each[key]:.1%}" for key in ("mfu", "of_ceiling")]
            memory = f"{each['bytes'] / 2**30:.2f} GiB" if "bytes" in each else ""
            speed = f"{each['units_per_second']:,.0f} {each['unit']}/s"
            if of["goal"] and contender == "bfloat16":
                speed += " (goal on an H100: {:,}; good: {:,})".format(*of["goal"])
            beside = f"{each['beside_TF32']:.2f}x"
            rows.append([name, contender, speed, f"{each['tflops_per_second']:.1f}", *shares, beside, memory])
    header = ["", "", "speed", "TFLOP/s", "MFU", "of the ceiling", "beside TF32", "memory"]
    table = markdown(header, rows)
    if not reached:
        return table
    return f"{table}\n{markdown(['', 'after compiling', 'validation accuracy', 'steps'], reached)}"


def step_time(result: dict[str, Any]) -> str:
    """Ratios of jaxmp's step, in float16, and of many steps in one dispatch."""
    rows = [
        [
            name,
            f"{min(each['min'] for each in of['microseconds'].values()):,.0f} us",
            pair,
            f"{ratio['min']:.2f}",
            f"{ratio['median']:.2f}",
        ]
        for name, of in result["results"].items()
        for pair, ratio in of["ratio"].items()
    ]
    return markdown(["model", "fastest step", "", "fastest", "median"], rows)


def ranges_cost(result: dict[str, Any]) -> str:
    """The share of the processor time that ranges take."""
    rows = [
        [name, f"{of['processor']['step_ms']:.2f} ms", f"{of['processor']['share']:.1%}"]
        for name, of in result["results"].items()
    ]
    return markdown(["config", "step", f"ranges every {result['every']} steps cost"], rows)


def watch_cost(result: dict[str, Any]) -> str:
    """What hooks and lines cost beside a step."""
    of = result["results"]
    rows = [[name, f"{us:.2f} us", f"{of['share'][name]:.3%}"] for name, us in of["added_us"].items()]
    return markdown([f"{result['config']}: a step of {of['step_us'] / 1000:.1f} ms", "adds", "share"], rows)


def recipe_time(result: dict[str, Any]) -> str:
    """The time of steps under recipes, and of what-if, in steps in float32."""
    names = list(dict.fromkeys(name for of in result["rows"] for name in of["steps in float32"]))
    rows = []
    for of in result["rows"]:
        ratios = of["steps in float32"]
        shown = [f"{ratios[name]:.2f}" if name in ratios else "" for name in names]
        rows.append([of["config"], f"{1000 * of['seconds']['float32']:.1f} ms", *shown, f"{of['load']}"])
    return markdown(["config", "float32", *names, "load"], rows)


def audit_time(result: dict[str, Any]) -> str:
    """The seconds of an audit."""
    rows = [[name, f"{seconds:.2f} s"] for name, seconds in result["fastest"].items()]
    return markdown([f"{result['layers']} layers, {result['parameters']:,} parameters", "fastest"], rows)


def tune_digits(result: dict[str, Any]) -> str:
    """What a study takes, and what its best is worth on fresh seeds."""
    best = result["best"]
    rows = [
        ["wall seconds", f"{result['wall_seconds']:.0f}"],
        ["processor seconds", f"{result['cpu_seconds']:.0f}"],
        ["trials", len(result["states"])],
        ["best trial", f"{best['trial']}: {', '.join(f'{k} {v}' for k, v in best['params'].items())}"],
        ["its validation loss, on the seed that chose it", f"{best['validation_loss']:.4f}"],
    ]
    for split in ("validation", "test"):
        of = result[f"{split}_loss"]
        seeds, pair = len(of["seeds"]), of["best_minus_default"]
        rows.append(
            [
                f"{split} loss beside the default's, {seeds} fresh seeds",
                f"{pair['mean']:+.4f} (95 %: {pair['low']:+.4f} to {pair['high']:+.4f})",
            ]
        )
    if "cost" in result:
        cost = result["cost"]
        rows.append(["trials / the same runs by `fit`", f"{cost['trials_to_fit']:.2f}"])
        rows.append(["trials / what their runs say that training took", f"{cost['trials_to_training']:.2f}"])
    return markdown(["a study", result["command"] if isinstance(result["command"], str) else ""], rows)


def pipelines(result: dict[str, Any]) -> str:
    """Examples a second of the pipelines, and their share of a step."""
    rows = [
        [
            name,
            f"{of['examples_per_second']:,}",
            f"{of['step_ms']} ms" if "step_ms" in of else "",
            f"{of['share']:.1%}" if "share" in of else "",
        ]
        for name, of in result["results"].items()
    ]
    return markdown(["config", "examples/s of one core", "step", "pipeline's share"], rows)


def streamed_memory(result: dict[str, Any]) -> str:
    """The memory of a run on a streamed set."""
    of = result["result"]
    rows = [[name, f"{mib} MiB"] for name, mib in of["largest_mib"].items()]
    return markdown([f"largest memory, streaming {of['set_mib']:,} MiB", ""], rows)


def gate_errors(result: dict[str, Any]) -> str:
    """How often a gate accepts what is worse by just its margin."""
    of = result["wrong_acceptances"]
    names = list(next(iter(of.values())))
    rows = [[distribution, *(f"{row[name]:.1%}" for name in names)] for distribution, row in of.items()]
    return markdown([f"differences of pairs, {result['studies']:,} studies", *names], rows)


def h100_program(result: dict[str, Any]) -> str:
    """Kernels and temporaries of the compiled programs."""
    rows = [
        [config, target, precision, program["kernels"], f"{program['memory of a GPU, in bytes']['temporaries']:,}"]
        for config, targets in result["results"].items()
        for target, precisions in targets.items()
        for precision, program in precisions.items()
    ]
    return markdown(["config", "target", "precision", "kernels", "bytes of temporaries"], rows)
