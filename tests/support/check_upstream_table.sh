#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Whether the table of PyTorch's tests in README.md is true: every test that it names exists, every upstream_*.hpp row is named, and every
# other cell says when or why not. usage: check_upstream_table.sh README.md <test executable>...   (each must have all rows)
set -euo pipefail
readme=$1
shift
heading="## The rows of PyTorch's tests"
section=$(awk -v heading="$heading" '$0 == heading {on = 1; next} /^## / {on = 0} on' "$readme")
cells=$(grep '^| `' <<<"$section" | sed 's/^| `[^`]*` | `[^`]*` | \(.*\) |$/\1/')
named=$(grep '^`' <<<"$cells" | sed 's/<br>/\n/g' | sed 's/^`\(.*\)`$/\1/' | sort -u)
subjects=$(grep '^- subject: ' <<<"$section" | sed 's/^- subject: //')
problems=0
problem() {
  echo "$readme: $1"
  problems=$((problems + 1))
}

[[ $(wc -l <<<"$cells") -gt 100 ]] || problem "the table under \"$heading\" is missing or cut"
while IFS= read -r cell; do
  case $cell in
    '`'*) ;;
    'later: '*) grep -qxF -- "${cell#later: }" <<<"$subjects" || problem "not one of the subjects: $cell" ;;
    'no C++ meaning: '?*) ;;
    *) problem "neither a test, nor later, nor without meaning: $cell" ;;
  esac
done <<<"$cells"

for executable; do
  listed=$("$executable" --no-colors --list-test-cases)
  rows=$(grep '^test_' <<<"$listed" | sort -u)
  while IFS= read -r name; do problem "names a test that $(basename "$executable") lacks: $name"; done < <(comm -23 <(echo "$named") <(echo "$rows") | grep . || true)
  while IFS= read -r name; do problem "does not name a row of $(basename "$executable"): $name"; done < <(comm -13 <(echo "$named") <(echo "$rows") | grep . || true)
done
[[ $# -gt 0 ]] || problem "no test executable to ask"
if ((problems > 0)); then exit 1; fi
echo "$(wc -l <<<"$cells") rows, $(wc -l <<<"$named") tests"
