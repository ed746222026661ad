"""What all messages of an image tell together: `python benchmarks/whole_run.py [--messages 3 10 29] [--only NAME]`.

A run of 900 steps of 32 over 1,000 images sends each 29 times. For settings of `matched_settings.py`, who is recognised
among 100, by image, hint and both, from that many messages per image: by the attack of the catalogue that puts
messages together, which finds out for itself what belongs together, and by the ideal attacker, who holds the
candidates and knows it (n = 100 x `matched_attacks.KEYS` draws of all noise). The strongest attack on one message is
that of `matched_client.py`.

Writes `reports/metrics/whole_run.csv`, rows of other settings and numbers of messages kept.
"""

import argparse

import pandas as pd
from matched_attacks import N, attacked
from matched_settings import SETTINGS

from splitlab import ROOT, load_base
from splitlab.core.tables import read_table, write_table

TABLE = ROOT / "reports/metrics/whole_run.csv"
MEASURED = ("matched-1", "floor-800", "coarse-1.8", "coarse-1.8-once", "disguised", "turned", "turned-once")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, nargs="*", default=(3, 10, 29))
    parser.add_argument("--only", nargs="*", default=MEASURED)
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - set(SETTINGS)):
        parser.error(f"no setting is called {', '.join(unknown)}; there: {', '.join(SETTINGS)}")
    base = load_base(ROOT / "models/base")
    known = read_table(TABLE).to_dict("records") if TABLE.exists() else []
    rows = {(row["setting"], row["messages"]): row for row in known}
    for name in args.only:
        defences, hidden = SETTINGS[name]
        for messages in args.messages:
            row = {"dataset": "shapes", "setting": name, "defences": str(defences) + (" recoloured" if hidden else "")}
            row |= {"messages": messages, "id_chance": 1 / N} | attacked(
                name, SETTINGS[name], "shapes", base, messages
            )[0]
            rows[name, messages] = row
            order = sorted(rows, key=lambda key: (list(SETTINGS).index(key[0]), key[1]))
            write_table(pd.DataFrame([rows[key] for key in order]).round(4), TABLE)
            print(pd.Series(row).to_string(), flush=True)


if __name__ == "__main__":
    main()
