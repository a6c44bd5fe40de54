"""The window in Japanese, which the browser asks for, and in English again, which is chosen in the header."""

import re
from typing import Any

import pytest

SAID = """() => [...document.querySelectorAll("body *")].filter((node) => node.offsetParent).flatMap(node => [
  ...[...node.childNodes].filter((child) => child.nodeType === 3).map((child) => child.data),
  ...["title", "placeholder", "aria-label", "alt"].map((name) => node.getAttribute(name) ?? "")])"""
SAME = re.compile(
    r"\S*[/\\].*\.safetensors|~/\S+|ComfyUI"
    r"|LoRA Easel|LoRAs?|Demo|Easel|English|alpha|AdamW|DDIM|kohya|fp16|SNR|px|GB|MB|GPU|CPU|UNet|LoHa|LoKr"
    r"|OFT|DoRA|Ctrl|Enter|Space|Shift|Delete|Esc|Alt|PNG|HEIC|CFG|\.safetensors|\.zip|[\w-]+\.png|velocity"
    r"|clip skip|diffusers|hub|id|owner/name|ntfy[\w./-]*|https?:\S+|Slack|Discord|Mattermost|lora-easel .*"
    r"|Hugging Face|HF_TOKEN|hf auth login|OneTrainer|ai-toolkit|SimpleTuner|(apple|house), duskprint[\w ,]*"
    r"|my style[-\d]*"
)
"""Names, units, keys, captions of the demo; what `test_other_tools` leaves in the home."""


@pytest.mark.own_window
def test_the_window_speaks_japanese_and_then_english(new_page: Any, window: Any) -> None:
    page = new_page(locale="ja-JP")
    page.goto(window.address)
    page.wait_for_selector("html[data-ready]")
    assert page.locator("html").get_attribute("lang") == "ja"
    page.click("#use-demo")
    page.wait_for_selector("#start:enabled")
    tabs = ["データセット", "学習", "プレビュー", "エクスポート", "ツールボックス"]
    assert page.locator("[role=tab]").all_text_contents() == tabs
    assert page.inner_text("#start") == "学習を開始"
    for tab in tabs:
        page.click(f"[role=tab]:text-is('{tab}')")
        page.wait_for_selector(f".tabitem[aria-label='{tab}']")
        left = {text.strip() for text in page.evaluate(SAID) if re.search("[a-z]{3}", SAME.sub("", text))}
        assert left == set(), tab

    page.select_option("#language", "en")
    page.wait_for_selector("[role=tab]:text-is('Dataset')")
    page.wait_for_selector("html[lang=en][data-ready]")
    assert page.inner_text("#start").strip() == "Start training"
    # Each write of the language has the browser compute all styles anew.
    written = page.evaluate(
        """() => {
          let written = 0;
          const lang = { get: () => "en", set: () => { written += 1; } };
          Object.defineProperty(document.documentElement, "lang", lang);
          window.easel.settle();
          return written;
        }"""
    )
    assert written == 0
