"""Ranges of characters, for the brackets of a regular expression, of scripts that matter here."""

HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNSPACED = (
    f"{HAN}\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
"""Scripts without spaces between words: Chinese, Japanese (kana), Thai, Lao, Burmese and Khmer."""
HANGUL = "\u1100-\u11ff\u3131-\u318e\uac00-\ud7af"
