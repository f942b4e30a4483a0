// Package monitor is pure statistics: values in, values out. It decides whether a candidate is worse than the stable
// version (the judge), what traffic looked like (profiles on a baseline's edges) and whether that differs from the
// training data (drift). It refuses to read a clock, do I/O, log, start goroutines or draw random numbers.
package monitor
