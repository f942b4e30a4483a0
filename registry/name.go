package registry

import (
	"regexp"
	"slices"
)

// Champion is the alias that always names the stable arm's version; SetRoute keeps it so.
const Champion = "champion"

var (
	modelName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	aliasName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]{0,63}$`)
	allDigits = regexp.MustCompile(`^[vV]?[0-9]+$`)
)

// CheckModelName returns an Invalid error unless name is 1 to 128 letters, digits, dots, dashes and underscores that
// begin with a letter or digit. "@" and "/" are left out because they address aliases and paths.
func CheckModelName(name string) error {
	if !modelName.MatchString(name) {
		return Errorf(Invalid, "model name %q: use 1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit", name)
	}
	return nil
}

// CheckAliasName returns an Invalid error unless name is 1 to 64 letters, digits, dots, dashes and underscores that
// begin with a letter and do not read as a version number.
func CheckAliasName(name string) error {
	if !aliasName.MatchString(name) || allDigits.MatchString(name) {
		return Errorf(Invalid, "alias %q: use 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter, not a version number", name)
	}
	return nil
}

// Closest returns the candidate with the smallest edit distance to name, when that distance is small enough to be a
// slip of the fingers (at most a third of the name and one more), else "".
func Closest(name string, candidates []string) string {
	best, bestDistance := "", len(name)/3+2
	for _, c := range slices.Sorted(slices.Values(candidates)) {
		if d := editDistance(name, c); d < bestDistance {
			best, bestDistance = c, d
		}
	}
	return best
}

// editDistance is Levenshtein's distance in bytes.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
