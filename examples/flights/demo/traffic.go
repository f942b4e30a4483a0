package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/orrery-ml/orrery/examples/flights/model"
)

// answer is what one request came back with.
type answer struct {
	late     float64
	version  string
	revision string
}

// ask sends one flight over REST.
func ask(ctx context.Context, c *http.Client, api string, x []float64, caller string) (answer, error) {
	var a answer
	raw, err := json.Marshal(map[string]any{"id": caller, "inputs": []any{map[string]any{
		"name": "flight", "datatype": "FP32", "shape": []int{1, len(model.Features)}, "data": x,
	}}})
	if err != nil {
		return a, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, api+"/v2/models/"+modelName+"/infer", bytes.NewReader(raw))
	if err != nil {
		return a, err
	}
	r.Header.Set("X-Orrery-Key", caller)
	got, err := c.Do(r)
	if err != nil {
		return a, err
	}
	defer func() { _ = got.Body.Close() }() // read
	body, err := io.ReadAll(got.Body)
	if err != nil {
		return a, err
	}
	if got.StatusCode != http.StatusOK {
		return a, fmt.Errorf("%s: %s", got.Status, body)
	}
	var v struct {
		Version string `json:"model_version"`
		Outputs []struct{ Data []float64 }
	}
	if err := json.Unmarshal(body, &v); err != nil {
		return a, err
	}
	return answer{late: v.Outputs[0].Data[0], version: v.Version, revision: got.Header.Get("X-Orrery-Revision")}, nil
}

// traffic replays flights from several callers and keeps the client's log.
type traffic struct {
	api    string
	rows   [][]float64
	client *http.Client
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu     sync.Mutex
	next   int
	season string
	took   []time.Duration
	routes map[string]int
	faults []string
}

// turn makes another season's flights the ones that are replayed, from the first on.
func (t *traffic) turn(season string, rows [][]float64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.season, t.rows, t.next = season, rows, 0
}

// sent returns how many flights of the season were sent.
func (t *traffic) sent() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.next
}

func newTraffic(api string, rows [][]float64) *traffic {
	transport := &http.Transport{MaxIdleConnsPerHost: 32}
	return &traffic{api: api, rows: rows, season: "winter", client: &http.Client{Transport: transport, Timeout: 10 * time.Second}, routes: map[string]int{}}
}

func (t *traffic) start(callers int) {
	ctx, cancel := context.WithCancel(context.Background())
	t.cancel = cancel
	for range callers {
		t.done.Go(func() {
			for ctx.Err() == nil {
				t.once(ctx)
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
}

func (t *traffic) once(ctx context.Context) {
	t.mu.Lock()
	i := t.next
	t.next++
	x, id := t.rows[i%len(t.rows)], t.season+"-"+strconv.Itoa(i)
	t.mu.Unlock()
	began := time.Now()
	a, err := ask(ctx, t.client, t.api, x, id)
	if ctx.Err() != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		t.faults = append(t.faults, err.Error())
		return
	}
	t.took = append(t.took, time.Since(began))
	t.routes[a.revision+"/"+a.version]++
}

func (t *traffic) stop() {
	if t.cancel != nil {
		t.cancel()
		t.done.Wait()
	}
}

func (t *traffic) answered() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.took)
}

// failures counts the failures whose text holds what is given.
func (t *traffic) failures(containing string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, f := range t.faults {
		if strings.Contains(f, containing) {
			n++
		}
	}
	return n
}

func (t *traffic) sample() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.faults {
		if !strings.Contains(f, "out of data bounds") {
			return f
		}
	}
	return ""
}

func (t *traffic) median() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	sorted := slices.Sorted(slices.Values(t.took))
	return sorted[len(sorted)/2]
}

func (t *traffic) byRoute() map[string]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := map[string]int{}
	maps.Copy(out, t.routes)
	return out
}
