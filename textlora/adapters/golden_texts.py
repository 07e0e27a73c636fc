"""Fixed neutral texts whose logits are stored with every adapter and recomputed when it is loaded.

They are never training rows. Changing one breaks no adapter: each folder carries the texts it was checked
with.
"""

GOLDEN_TEXTS = (
    "The train to the coast leaves at nine and arrives before noon.",
    "ok",
    "Please send the blue folder to room 214, not to the front desk.",
    "Water boils at 100 degrees; at altitude it takes less.",
    "Was that the second or the third time this week?!",
    "El mercado abre los domingos, también en invierno.",
    "회의는 수요일 오후 세 시에 시작합니다.",
    "I did not think it was bad, but I would not call it good either, and after two hours in the queue nobody at my table "
    "could say what the fuss had been about or whether we would come again.",
)
GOLDEN_PAIRS = (
    ("A man is repairing a bicycle.", "Somebody fixes a bike."),
    ("The shop closes at six.", "The shop is open all night."),
    ("ok", "no"),
    ("Two dogs run along the beach while children watch.", "Animals are outside."),
)


def golden_rows(pairs: bool) -> list[tuple[str, str | None]]:
    """The texts, or for a pair task the pairs, as (text, text_pair)."""
    return list(GOLDEN_PAIRS) if pairs else [(text, None) for text in GOLDEN_TEXTS]
