"""What the report says beside its counts: what is hardly meant, what goes unused, what a template does, categories."""

from __future__ import annotations

from kto_core.data.records.rows import shorten
from kto_core.data.report import Report
from kto_studio.shared.prose import note

from .view import esc

MOST = 12  # categories that are shown


def warnings(report: Report) -> str:
    """What can be trained on, but is hardly meant; "" where there is nothing to say."""
    return "".join(note(said) for said in report.warnings)


def answers(report: Report) -> str:
    """How long the answers of both labels are."""
    if not (found := report.answers):
        return ""
    return (
        f'<p class="card-text">Answers: median <b>{found["desirable"]:,}</b> characters if good, '
        f"<b>{found['undesirable']:,}</b> if bad.</p>"
    )


def categories(report: Report) -> str:
    """Rows of each category, good and bad."""
    if not report.categories:
        return ""
    rows = report.categories["rows"]
    most = max(good + bad for good, bad in rows.values())
    lines = "".join(
        f'<tr><td>{esc(shorten(value, 40))}</td><td class="share" title="{good:,} good, {bad:,} bad">'
        f'<i class="good" style="width:{100 * good / most:.1f}%"></i><i class="bad" '
        f'style="width:{100 * bad / most:.1f}%"></i></td><td class="n">{good:,}</td><td class="n">{bad:,}</td></tr>'
        for value, (good, bad) in list(rows.items())[:MOST]
    )
    more = f'<p class="card-text">And {len(rows) - MOST} more.</p>' if len(rows) > MOST else ""
    return (
        f'<h2 class="card-title">Rows by {esc(report.categories["column"])}</h2><div class="report categories"><table>'
        '<thead><tr><th scope="col">Value</th><th scope="col"></th><th scope="col" class="n">Good</th>'
        f'<th scope="col" class="n">Bad</th></tr></thead><tbody>{lines}</tbody></table></div>{more}'
    )


def beside(report: Report) -> str:
    """Columns that are not trained on, and what the model's template does to the rows."""
    said = [esc(sentence) for sentence in report.seen.sentences()] if report.seen else []
    if report.unused:
        names = ", ".join(f"<b>{esc(shorten(name, 40))}</b>" for name, _ in report.unused.most_common(20))
        more = f" and {len(report.unused) - 20} more" if len(report.unused) > 20 else ""
        said.append(f"Kept with their rows, but not trained on: {names}{more}.")
    return "".join(f'<p class="card-text">{sentence}</p>' for sentence in said)
