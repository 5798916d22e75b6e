"""The chat format against the published package cohere_melody: melody.py CONFORMANCE TOKENIZER SDIST [SEED]

CONFORMANCE is the binary of crates/router/examples/conformance.rs, SDIST the unpacked source package: its pairs of input and
rendered prompt are compared with what our chat template engine makes of the same template, and its filter with our parser.
"""

import json
import pathlib
import random
import subprocess
import sys

from cohere_melody import PyFilter

OUTPUTS = 1000
PROMPT = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>"


class Cohort:
    """Asks our binary, a line at a time."""

    def __init__(self, binary: str, tokenizer: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([binary, tokenizer], stdin=pipe, stdout=pipe, text=True, encoding="utf-8")

    def ask(self, task: dict) -> dict:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


# ---- prompts ----

# Pairs that cannot be the same, with the reason.
NOT_OURS = {
    '"type": "image"': "an image: cohere2_moe is the model of text, and a part that is no text is refused by its name",
    '"template_jinja"': "a template of the request's own, over the package's form of messages: here the checkpoint has the template",
}


def escaped(value, table: dict):
    """The package replaces special tokens inside results; here that is the caller's to do."""
    if isinstance(value, str):
        for token, replacement in table.items():
            value = value.replace(token, replacement)
    elif isinstance(value, dict):
        value = {key: escaped(inner, table) for key, inner in value.items()}
    elif isinstance(value, list):
        value = [escaped(inner, table) for inner in value]
    return value


def cited(text: str, citations: list) -> str:
    """Citations of earlier turns are written into the text, as /v2/chat does it."""
    for citation in sorted(citations, key=lambda citation: -citation["start_index"]):
        numbers = lambda source: ",".join(map(str, source["tool_result_indices"]))
        sources = ",".join(f"{source['tool_call_index']}:[{numbers(source)}]" for source in citation["sources"])
        start, end = citation["start_index"], citation["end_index"]
        if end > len(text):
            continue
        text = f"{text[:start]}<co>{text[start:end]}</co: {sources}>{text[end:]}"
    return text


def chat_of(config: dict) -> dict:
    """An input of the package as the chat of one of our requests."""
    table = config.get("escaped_special_tokens", {})
    names = lambda text: json.dumps(text, ensure_ascii=False)[1:-1]
    messages = []
    for message in config["messages"]:
        role = {"chatbot": "assistant"}.get(message["role"].lower(), message["role"].lower())
        ours = {"role": role}
        content = message.get("content", [])
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        marks = message.get("citations", [])
        of = lambda thinking: [mark for mark in marks if mark["is_thinking"] == thinking]
        text = cited("".join(part["text"] for part in content if part["type"] == "text"), of(False))
        text = escaped(text, table)
        thinking = cited("".join(part["thinking"] for part in content if part["type"] == "thinking"), of(True))
        if role == "tool":
            ours["tool_call_id"] = message["tool_call_id"]
            results = [
                part["document"] if part["type"] == "document" else {"content": part["text"]} for part in content
            ]
            ours["results"] = escaped(results, table)
        elif message.get("tool_calls"):
            # What is said with a call is the plan.
            ours["reasoning"] = thinking or text
            ours["tool_calls"] = [
                {"id": call["id"], "name": names(call["name"]), "arguments": call["parameters"]}
                for call in message["tool_calls"]
            ]
        else:
            ours["content"], ours["reasoning"] = text, thinking
        messages.append(ours)
    chat = {"messages": messages, "documents": escaped(config.get("documents", []), table)}
    chat["tools"] = [
        {"type": "function", "function": {**tool, "name": names(tool["name"]), "description": names(tool["description"])}}
        for tool in config.get("available_tools", [])
    ]
    arguments = {"convert_first_system_msg": False}
    for theirs, name in (("dev_instruction", "developer_instruction"), ("platform_instruction", "platform_instruction_override")):
        if config.get(theirs) is not None:
            arguments[name] = config[theirs]
    # The package grounds answers unless it is told not to.
    arguments["grounding"] = config.get("grounding", "enabled")
    if config.get("json_schema"):
        arguments["response_format"] = {"type": "json_object", "json_schema": config["json_schema"]}
    elif config.get("json_mode"):
        arguments["response_format"] = {"type": "json_object"}
    chat["reasoning"] = config.get("reasoning_type", "enabled") == "enabled"
    chat["template_arguments"] = arguments
    return chat


def prompts(cohort: Cohort, sdist: pathlib.Path) -> int:
    template = (sdist / "gen/templates/jinja/cmd4-hf.jinja").read_text(encoding="utf-8")
    pairs = sorted((sdist / "tests/templating/cmd4_hf").iterdir())
    same, wrong, left_out = 0, 0, 0
    for pair in pairs:
        config = json.loads((pair / "input.json").read_text(encoding="utf-8"))
        expected = (pair / "output.txt").read_text(encoding="utf-8")
        reason = next((why for word, why in NOT_OURS.items() if word in json.dumps(config)), None)
        if reason:
            left_out += 1
            print(f"  left out: {pair.name} ({reason})")
            continue
        got = cohort.ask({"template": template, "chat": chat_of(config)})
        if got.get("rendered") == expected:
            same += 1
            continue
        wrong += 1
        own = got.get("rendered", str(got))
        at = next((at for at, (a, b) in enumerate(zip(expected, own)) if a != b), min(len(expected), len(own)))
        around = slice(max(at - 60, 0), at + 120)
        print(f"  differs: {pair.name}, at {at}\n    expected {expected[around]!r}\n    got      {own[around]!r}")
    print(f"prompts: {same} of {len(pairs)} pairs are the same, {wrong} differ, {left_out} are of what this server refuses")
    return wrong


# ---- answers ----

# No lone `<`: the package loses one that is a piece of its own.
WORDS = ["a", "the", "Grüße", "漢字", "🦀", "1 > 2", "\n", "```rust\n", "x|y", "{}", "[0]", "co>", "é"]


def text(rng: random.Random, most: int) -> str:
    # Blanks at the ends are trimmed by the package and kept by us: none are made.
    words = [rng.choice(WORDS) for _ in range(rng.randrange(1, most))]
    return ("w " + " ".join(words) + " w").replace("\n w", "\nw")


def grounded(rng: random.Random, most: int) -> str:
    whole = text(rng, most)
    for _ in range(rng.randrange(3)):
        sources = [
            f"{rng.randrange(3)}:[{','.join(str(rng.randrange(9)) for _ in range(rng.randrange(1, 4)))}]"
            for _ in range(rng.randrange(1, 3))
        ]
        whole += f" <co>{text(rng, 4)}</co: {','.join(sources)}> {text(rng, 4)}"
    return whole


def value(rng: random.Random, depth: int = 0):
    kinds = ["text", "number", "bool", "null"] + (["list", "object"] if depth < 3 else [])
    match rng.choice(kinds):
        case "text":
            return text(rng, 4) + rng.choice(["", '"', "\\", "\t", "/"])
        case "number":
            return rng.choice([0, -1, 12.5, 1e20, 123456])
        case "bool":
            return rng.random() < 0.5
        case "null":
            return None
        case "list":
            return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
        case _:
            return {f"k{at}": value(rng, depth + 1) for at in range(rng.randrange(3))}


def answer(rng: random.Random, generation: int) -> str:
    name = "TEXT" if generation == 4 else "RESPONSE"
    whole = grounded(rng, 12) + "<|END_THINKING|>" if rng.random() < 0.8 else "<|END_THINKING|>"
    if rng.random() < 0.5:
        return whole + f"<|START_{name}|>{grounded(rng, 30)}<|END_{name}|>"
    calls = [
        {"tool_call_id": str(at), "tool_name": f"tool_{at}", "parameters": {f"p{n}": value(rng) for n in range(rng.randrange(4))}}
        for at in range(rng.randrange(1, 4))
    ]
    lines = ",\n    ".join(json.dumps(call, ensure_ascii=rng.random() < 0.5) for call in calls)
    return whole + f"<|START_ACTION|>[\n    {lines}\n]<|END_ACTION|>"


def pieces(rng: random.Random, whole: str) -> list[str]:
    """Cut at random, but for markers: those are tokens of their own."""
    found = []
    while whole:
        if whole.startswith("<|"):
            size = whole.index("|>") + 2
        else:
            end = whole.find("<|")
            size = min(rng.randrange(1, 9), end if end > 0 else len(whole))
        found.append(whole[:size])
        whole = whole[size:]
    return found


def theirs(parts: list[str], generation: int) -> dict:
    filter = PyFilter.cmd4() if generation == 4 else PyFilter.cmd3()
    whole = {"text": "", "reasoning": "", "calls": {}, "citations": []}
    filter.write_decoded("<|START_THINKING|>")
    for result in [*(filter.write_decoded(part) for part in parts), filter.flush_partials()]:
        whole["text"] += result.content or ""
        whole["reasoning"] += result.reasoning or ""
        for call in result.tool_calls:
            known = whole["calls"].setdefault(call.index, {"name": "", "arguments": ""})
            known["name"] += call.name or ""
            known["arguments"] += call.arguments or ""
        whole["citations"] += [
            {
                "thinking": mark.is_thinking,
                "start": mark.start_index,
                "end": mark.end_index,
                "text": mark.text,
                "sources": [[source.tool_call_index, list(source.tool_result_indices)] for source in mark.sources],
            }
            for mark in result.citations
        ]
    whole["calls"] = [whole["calls"][index] for index in sorted(whole["calls"])]
    return whole


def comparable(whole: dict) -> dict:
    for call in whole["calls"]:
        # Of a call without parameters the package says nothing.
        call["arguments"] = json.loads(call["arguments"] or "{}")
    return whole


def answers(cohort: Cohort, seed: int) -> int:
    rng = random.Random(seed)
    print(f"  seed {seed}")
    wrong = 0
    for number in range(OUTPUTS):
        generation = rng.choice([3, 4])
        whole = answer(rng, generation)
        parts = pieces(rng, whole)
        ours = comparable(cohort.ask({"prompt": PROMPT, "pieces": parts}))
        expected = comparable(theirs(parts, generation))
        if ours != expected:
            wrong += 1
            if wrong <= 5:
                print(f"  differs: {number}, generation {generation}\n    said     {whole!r}\n    expected {expected}\n    got      {ours}")
    print(f"answers: {OUTPUTS - wrong} of {OUTPUTS} are the same, {wrong} differ")
    return wrong


binary, tokenizer, sdist = sys.argv[1:4]
asked = Cohort(binary, tokenizer)
faults = prompts(asked, pathlib.Path(sdist)) + answers(asked, int(sys.argv[4]) if len(sys.argv) > 4 else 20260)
sys.exit(1 if faults else 0)
