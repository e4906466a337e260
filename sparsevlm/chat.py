"""Talk to a model about pictures and videos: several turns, the reply printed as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsevlm.data.sample import BadSampleError, Media, Message, Sample
from sparsevlm.rundir import choose_device, resolve_model
from sparsevlm.vision.tokens import MediaKind

HELP = """/image PATH   show a picture with the next question
/video PATH   show a video with the next question
/reset        forget the conversation
/exit         leave (also Ctrl-D)"""

Say = Callable[[str], None]


@dataclass(frozen=True)
class ChatOptions:
    """How replies are generated.

    Attributes:
        max_new_tokens: Longest reply.
        temperature: 0 always takes the likeliest token; above it sampling is flatter the higher it is.
        top_p: Sample from the smallest set of tokens that holds this much probability.
        seed: Seed of sampling.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def generate_kwargs(self) -> dict[str, Any]:
        """Return the options in `generate`'s words; what a checkpoint carries of its own is overridden."""
        common = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, "top_k": None}
        if self.temperature == 0:
            return common | {"do_sample": False, "temperature": None, "top_p": None}
        return common | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@dataclass
class Chat:
    """One conversation with a model.

    Attributes:
        model: The model, in evaluation mode.
        processor: Its processor.
        options: How replies are generated.
        messages: The turns so far. Media stay in the turn that they were shown with.
        pending: Media that the next question will show.
    """

    model: Any
    processor: Any
    options: ChatOptions = field(default_factory=ChatOptions)
    messages: list[Message] = field(default_factory=list)
    pending: list[Media] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        # A generator of its own would not reach `generate`; the global one is seeded once, so turns differ.
        torch.manual_seed(self.options.seed)

    def show(self, kind: MediaKind, path: str | Path) -> None:
        """Add a picture or video to the next question; see `load_media`."""
        self.pending.append(load_media(kind, path))

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()
        self.pending.clear()

    def ask(self, text: str, say: Say = lambda _: None) -> str:
        """Ask a question and return the reply.

        The turn enters the history only when its reply is there: after an error or an interruption the conversation
        is what it was before.

        Args:
            text: The question.
            say: Called with every piece of the reply as soon as it is there.

        Raises:
            ValueError: Media cannot be read, or the conversation no longer fits the model's context.
        """
        import torch

        turn = Message("user", (*self.pending, text))
        inputs = self.processor.encode_prompts([Sample((*self.messages, turn), id="chat")])
        options = self.options.generate_kwargs() | {"max_new_tokens": self._room(inputs["input_ids"].shape[1])}
        tokenizer = self.processor.tokenizer
        with torch.no_grad():
            output = self.model.generate(
                **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
                **options,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=_streamer(tokenizer, say),
            )
        reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages += [turn, Message("assistant", (reply,))]
        self.pending.clear()
        return reply

    def _room(self, prompt: int) -> int:
        """Return how long a reply to a prompt of so many tokens may become."""
        context = getattr(getattr(self.model.config, "text_config", None), "max_position_embeddings", None)
        if context is None:
            return self.options.max_new_tokens
        if prompt >= context:
            raise ValueError(
                f"the conversation has {prompt} tokens and the model's context holds {context}: start again with "
                "/reset, or show fewer pictures"
            )
        return min(self.options.max_new_tokens, context - prompt)


def open_chat(
    target: str,
    options: ChatOptions,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    device: str | None = None,
    dtype: str = "auto",
) -> Chat:
    """Load a model and show it the first turn's media.

    Args:
        target: Run or model directory, or Hub id.
        options: How replies are generated.
        images: Paths of pictures.
        videos: Paths of videos.
        device: Where to run; default: a GPU where there is one.
        dtype: Type of the weights; ``"auto"`` as saved.

    Raises:
        ValueError: No such model, or a file that is missing or no picture; files are checked first.
    """
    shown = [load_media(MediaKind.IMAGE, path) for path in images]
    shown += [load_media(MediaKind.VIDEO, path) for path in videos]
    path = resolve_model(target)
    device = choose_device(device)
    from sparsevlm.model.build import load_model

    model: Any
    model, processor = load_model(path, dtype=dtype)
    model.to(device).eval()
    return Chat(model, processor, options, pending=shown)


def load_media(kind: MediaKind, path: str | Path) -> Media:
    """Return a picture or video to show. A picture is read here, once; a video only when it is asked about.

    Raises:
        ValueError: The file is missing or cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a directory, not a file" if file.is_dir() else "no such file"
        raise ValueError(f"{kind.value} {path}: {what}")
    if kind is MediaKind.VIDEO:
        return Media(kind, file)
    from sparsevlm.data.media import load_image

    try:
        return Media(kind, load_image(Media(kind, file)))
    except BadSampleError as error:
        raise ValueError(f"{kind.value} {path}: {error}") from None


def _streamer(tokenizer: Any, say: Say) -> Any:
    """Return a streamer that hands finished text to ``say``, in the calling thread: errors and Ctrl-C arrive there."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        started = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            # Templates end at "ASSISTANT:" and replies begin with a blank; the reply that is kept has none either.
            text = text if self.started else text.lstrip()
            if text:
                self.started = True
                say(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def one_shot(chat: Chat, prompts: Sequence[str], out: Any = None) -> list[str]:
    """Ask prompts one after the other in one conversation; print each reply on lines of its own."""
    out = out or sys.stdout
    replies = []
    for prompt in prompts:
        replies.append(chat.ask(prompt, say=_writer(out)))
        print(file=out, flush=True)
    return replies


def converse(chat: Chat, lines: Iterator[str] | None = None, out: Any = None) -> None:
    """Hold a conversation until /exit or the end of input.

    Args:
        chat: The conversation.
        lines: What the user types; default: the terminal, with a prompt.
        out: Where replies go; default: standard output.
    """
    out = out or sys.stdout
    print(HELP, file=out)
    for line in _typed_lines(out) if lines is None else lines:
        command, _, argument = line.strip().partition(" ")
        try:
            if command in ("/exit", "/quit"):
                return
            if command.startswith("/"):
                print(_command(chat, command, argument.strip()), file=out)
            elif line.strip():
                chat.ask(line.strip(), say=_writer(out))
                print(file=out, flush=True)
        except (BadSampleError, ValueError) as error:
            print(f"{error}", file=out)
        except KeyboardInterrupt:
            print("\n(interrupted; this turn is forgotten)", file=out)


def _command(chat: Chat, command: str, argument: str) -> str:
    """Carry out a line that begins with a slash; return what to tell the user."""
    if command in ("/image", "/video"):
        if not argument:
            raise ValueError(f"{command} needs a path: {command} PATH")
        chat.show(MediaKind(command[1:]), argument.strip("\"'"))
        return f"({command[1:]} goes with the next question)"
    if command == "/reset":
        chat.reset()
        return "(conversation forgotten)"
    return HELP if command == "/help" else f"unknown command {command}\n{HELP}"


def _typed_lines(out: Any) -> Iterator[str]:
    """Yield typed lines until the end of input; Ctrl-C at the prompt ends too."""
    with suppress(ImportError):  # not on every platform; input() works without
        import readline  # noqa: F401  # gives input() a history and line editing
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return


def _writer(out: Any) -> Say:
    def write(text: str) -> None:
        print(text, end="", file=out, flush=True)

    return write
