"""Sample with the official `openai` client: the base model, or a checkpoint by its tinker:// path.

python cookbook/openai_sample.py
python cookbook/openai_sample.py --model 'tinker://…/sampler_weights/proverbs' 'The early bird'
"""

from __future__ import annotations

import argparse
import sys

import openai

from sdk.environment import client_environment
from sdk.scripts import at_least_one, told


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", default="What is 3 + 4?")
    parser.add_argument(
        "--base-url",
        default=client_environment().url,
        help="where the gateway answers; else TANDEM_URL, else here",
    )
    parser.add_argument(
        "--api-key",
        default=None,
        help="else TANDEM_API_KEY or TINKER_API_KEY; a gateway without keys needs none",
    )
    parser.add_argument(
        "--model", default=None, help="base model or tinker:// path; the first one served if left out"
    )
    parser.add_argument("--max-tokens", type=at_least_one, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> str:
    args = arguments(argv)
    key = args.api_key or client_environment().key or "tml-local"
    client = openai.OpenAI(base_url=f"{args.base_url}/v1", api_key=key)
    model = args.model or client.models.list().data[0].id
    print(f"{model}\n> {args.question}")
    answer = ""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": args.question}],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices and (text := event.choices[0].delta.content):
            answer += text
            sys.stdout.write(text)
            sys.stdout.flush()
        if event.usage is not None:
            print(f"\n({event.usage.prompt_tokens} tokens in, {event.usage.completion_tokens} out)")
    return answer


if __name__ == "__main__":
    sys.exit(told(main))
