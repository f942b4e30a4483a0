package main

import (
	"context"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// caller sends one request and returns when it is answered.
type caller func(ctx context.Context) error

// result is what a load measured.
type result struct {
	took    time.Duration
	ok      int
	failed  int
	inTime  int             // answered by the deadline, when there is one
	latency []time.Duration // of answers, ascending; from the moment the request was meant to go
	shed    []time.Duration // of refusals
}

func (r result) rate() float64 { return float64(r.ok) / r.took.Seconds() }

func (r result) quantile(q float64) time.Duration { return quantile(r.latency, q) }

func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// closedLoop lets n callers each send the next request when the last is answered. The first part warms up.
func closedLoop(ctx context.Context, call caller, n int, warm, length time.Duration) result {
	var wg sync.WaitGroup
	var measuring atomic.Bool
	stop, cancel := context.WithTimeout(ctx, warm+length)
	defer cancel()
	parts := make([]result, n)
	for i := range n {
		wg.Go(func() {
			for stop.Err() == nil {
				began := time.Now()
				err := call(ctx)
				took := time.Since(began)
				switch {
				case !measuring.Load():
				case err != nil:
					parts[i].failed++
				default:
					parts[i].ok++
					parts[i].latency = append(parts[i].latency, took)
				}
			}
		})
	}
	time.Sleep(warm)
	measuring.Store(true)
	began := time.Now()
	<-stop.Done()
	out := result{took: time.Since(began)}
	wg.Wait()
	for _, p := range parts {
		out.ok += p.ok
		out.failed += p.failed
		out.latency = append(out.latency, p.latency...)
	}
	slices.Sort(out.latency)
	return out
}

// openLoop sends requests at random moments (Poisson) at a rate, whether or not earlier ones are answered, and measures
// each from the moment it was meant to go: a server that stalls makes every request it delays slow, not just one.
func openLoop(ctx context.Context, call caller, rate float64, warm, length, deadline time.Duration) result {
	defer sleepExactly()()
	r := rand.New(rand.NewPCG(11, 12)) //nolint:gosec // the same arrivals on every run
	var wg sync.WaitGroup
	var mu sync.Mutex
	out := result{took: length}
	began := time.Now()
	slots := make(chan struct{}, 20_000)
	for at := time.Duration(0); at < warm+length; at += time.Duration(r.ExpFloat64() / rate * 1e9) {
		if left := time.Until(began.Add(at)); left > 0 {
			nap := syscall.NsecToTimespec(left.Nanoseconds())
			_ = syscall.Nanosleep(&nap, nil) // a signal wakes early, which is as good
		}
		meant := began.Add(at)
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			call, cancel := call, context.CancelFunc(func() {})
			inner := ctx
			if deadline > 0 {
				inner, cancel = context.WithDeadline(ctx, meant.Add(deadline))
			}
			defer cancel()
			err := call(inner)
			took := time.Since(meant)
			if at < warm {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				out.failed++
				out.shed = append(out.shed, took)
				return
			}
			out.ok++
			out.latency = append(out.latency, took)
			if deadline == 0 || took <= deadline {
				out.inTime++
			}
		})
	}
	wg.Wait()
	slices.Sort(out.latency)
	slices.Sort(out.shed)
	return out
}

// sleepExactly lets the caller's goroutine sleep to some microseconds, until the returned function is called: Go's own
// timers, and the kernel's usual slack, would make a fast server look a millisecond slow.
func sleepExactly() (restore func()) {
	const setTimerSlack, nanosecond = 29, 1 // of prctl(2)
	procs := runtime.GOMAXPROCS(4)          // others run while this thread sleeps in the kernel
	runtime.LockOSThread()
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, setTimerSlack, nanosecond, 0) // without it the numbers are worse, not wrong
	return func() {
		runtime.UnlockOSThread()
		runtime.GOMAXPROCS(procs)
	}
}
