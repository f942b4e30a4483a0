package gateway

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math"
	"strconv"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/monitor/records"
	"github.com/orrery-ml/orrery/registry"
)

const (
	recordQueue = 8192            // answered requests that wait to be recorded; more are dropped and counted
	recordEvery = 5 * time.Second // files are written this often
	recordRows  = 50_000          // or when a version has this many
)

// TrafficRecorder folds answered requests into profiles and, where the serving config says so, into inference records.
// Its queue is bounded: it drops and counts rather than block, and writes what it has when it stops.
type TrafficRecorder struct {
	objects registry.Objects
	log     *slog.Logger
	writer  string
	queue   chan Traffic
	dropped prometheus.Counter
	written *prometheus.CounterVec

	mu       sync.Mutex
	versions map[demandKey]*recorded // what the table knows

	serial int64 // of files; only Run's goroutine
	open   map[demandKey]*pendingFile
}

// recorded is what the recorder needs to know of a version.
type recorded struct {
	version  registry.Version
	baseline *monitor.Baseline // nil until it is fetched
	fetched  bool
}

// pendingFile is what is not written yet of one version.
type pendingFile struct {
	first, last time.Time
	features    []string
	profiles    records.Profiles
	rows        []records.Record
}

// NewRecorder makes a recorder; Run makes it work.
func NewRecorder(o registry.Objects, r prometheus.Registerer, log *slog.Logger) *TrafficRecorder {
	t := &TrafficRecorder{
		objects: o, log: log, writer: uuid.NewString()[:8], queue: make(chan Traffic, recordQueue),
		versions: map[demandKey]*recorded{}, open: map[demandKey]*pendingFile{},
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "orrery_recorder_dropped_total", Help: "Answered requests that were not recorded because the queue was full.",
		}),
		written: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "orrery_recorder_files_total", Help: "Files of records and profiles, by result.",
		}, []string{"kind", "result"}),
	}
	r.MustRegister(t.dropped, t.written)
	return t
}

// Configure implements Recorder.
func (t *TrafficRecorder) Configure(m registry.Model, versions map[int]registry.Version) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for n, v := range versions {
		k := demandKey{m.Name, n}
		if known, ok := t.versions[k]; !ok || known.version.Documents != v.Documents {
			t.versions[k] = &recorded{version: v}
		}
	}
}

// Record implements Recorder.
func (t *TrafficRecorder) Record(r Traffic) {
	if r.Model.Config.Recording == registry.RecordOff {
		return
	}
	select {
	case t.queue <- r:
	default:
		t.dropped.Inc()
	}
}

// Run records until ctx ends, and then what is left in the queue.
func (t *TrafficRecorder) Run(ctx context.Context) error {
	ticker := time.NewTicker(recordEvery)
	defer ticker.Stop()
	for {
		select {
		case r := <-t.queue:
			t.fold(ctx, r)
		case <-ticker.C:
			t.flush(ctx)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			for len(t.queue) > 0 {
				t.fold(last, <-t.queue)
			}
			t.flush(last)
			return nil
		}
	}
}

// known returns what there is of a version, fetching its baseline once.
func (t *TrafficRecorder) known(ctx context.Context, k demandKey) *recorded {
	t.mu.Lock()
	v := t.versions[k]
	t.mu.Unlock()
	if v == nil || v.fetched || v.version.Documents.Baseline == "" {
		return v
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var b monitor.Baseline
	if err := records.ReadJSON(ctx, t.objects, registry.BlobKey(v.version.Documents.Baseline), &b); err != nil {
		t.log.Warn("read a baseline", "model", k.model, "version", k.version, "error", err)
		return v
	}
	v.baseline, v.fetched = &b, true
	return v
}

func (t *TrafficRecorder) fold(ctx context.Context, r Traffic) {
	k := demandKey{r.Model.Name, r.Version}
	v := t.known(ctx, k)
	if v == nil {
		return
	}
	rows, features := featureRows(v.version.Signature, r.Request)
	if len(rows) == 0 {
		return
	}
	f := t.open[k]
	if f == nil {
		f = &pendingFile{first: r.At, features: features, profiles: records.Profiles{
			Model: k.model, Version: k.version, Features: map[string]monitor.Profile{},
		}}
		t.open[k] = f
	}
	f.last = r.At
	f.profiles.Rows += int64(len(rows))
	if v.baseline != nil {
		f.profile(*v.baseline, features, rows)
	}
	if r.Model.Config.Recording == registry.RecordRows {
		f.record(r, rows)
	}
	if len(f.rows) >= recordRows {
		t.flush(ctx)
	}
}

func (f *pendingFile) profile(b monitor.Baseline, features []string, rows [][]float64) {
	for _, feature := range b.Features {
		for i, name := range features {
			if name != feature.Name {
				continue
			}
			p := f.profiles.Features[name]
			for _, row := range rows {
				p.Add(feature, row[i])
			}
			f.profiles.Features[name] = p
		}
	}
}

// record keeps the rows whose id falls into the sample; requests, answers and labels of an id are sampled alike.
func (f *pendingFile) record(r Traffic, rows [][]float64) {
	outputs := outputRows(r.Response, len(rows))
	for i, row := range rows {
		id := r.Response.GetId()
		if len(rows) > 1 {
			id += "/" + strconv.Itoa(i)
		}
		if float64(xxhash.Sum64String(id)) >= r.Model.Config.SampleRate*math.MaxUint64 {
			continue
		}
		f.rows = append(f.rows, records.Record{ID: id, At: r.At, Version: r.Version, Role: string(r.Role), Features: row, Outputs: outputs[i]})
	}
}

func (t *TrafficRecorder) flush(ctx context.Context) {
	for k, f := range t.open {
		delete(t.open, k)
		t.serial++
		if len(f.profiles.Features) > 0 {
			key := records.Slice{Prefix: records.ProfilePrefix, Model: k.model, Version: k.version, From: f.first, To: f.last}.Key(t.writer, t.serial, "json")
			t.wrote("profile", key, records.WriteJSON(ctx, t.objects, key, f.profiles))
		}
		if len(f.rows) > 0 {
			key := records.Slice{Prefix: records.RecordPrefix, Model: k.model, Version: k.version, From: f.first, To: f.last}.Key(t.writer, t.serial, "parquet")
			raw, err := records.EncodeRecords(f.features, f.rows)
			if err == nil {
				err = t.objects.Put(ctx, key, bytes.NewReader(raw), int64(len(raw)))
			}
			t.wrote("records", key, err)
		}
	}
}

func (t *TrafficRecorder) wrote(kind, key string, err error) {
	if err != nil {
		t.written.WithLabelValues(kind, "failed").Inc()
		t.log.Warn("write records", "key", key, "error", err)
		return
	}
	t.written.WithLabelValues(kind, "ok").Inc()
}

// featureRows reads the only input of a request as rows of features; none when the model has several inputs or the
// input is not a matrix of numbers. Features without names are called x0, x1, ….
func featureRows(s registry.Signature, r *inference.ModelInferRequest) (rows [][]float64, names []string) {
	if len(s.Inputs) != 1 || len(r.GetInputs()) != 1 || len(r.GetRawInputContents()) != 1 {
		return nil, nil
	}
	in := r.GetInputs()[0]
	shape := in.GetShape()
	if len(shape) != 2 || shape[1] < 1 {
		return nil, nil
	}
	width := int(shape[1])
	names = s.Inputs[0].Features
	for i := len(names); i < width; i++ {
		names = append(names, fmt.Sprintf("x%d", i))
	}
	values := numbers(in.GetDatatype(), r.GetRawInputContents()[0], -1)
	for i := 0; i+width <= len(values); i += width {
		rows = append(rows, values[i:i+width])
	}
	return rows, names
}

// outputRows reads the first output as n rows.
func outputRows(a *inference.ModelInferResponse, n int) [][]float64 {
	out := make([][]float64, n)
	if len(a.GetOutputs()) == 0 || len(a.GetRawOutputContents()) == 0 {
		return out
	}
	values := numbers(a.GetOutputs()[0].GetDatatype(), a.GetRawOutputContents()[0], -1)
	width := len(values) / n
	for i := range out {
		out[i] = values[i*width : (i+1)*width]
	}
	return out
}

// StoreLabels writes labels of a model, by inference id.
func (g *Gateway) StoreLabels(ctx context.Context, o registry.Objects, model string, labels map[string]float64) error {
	list := make([]records.Label, 0, len(labels))
	for id, v := range labels {
		list = append(list, records.Label{ID: id, Value: v})
	}
	now := time.Now()
	raw, err := records.EncodeLabels(list, now)
	if err != nil {
		return err
	}
	key := fmt.Sprintf("%smodel=%s/date=%s/%d-%s.parquet", records.LabelPrefix, model, now.UTC().Format(time.DateOnly), now.UnixMicro(), uuid.NewString()[:8])
	return o.Put(ctx, key, bytes.NewReader(raw), int64(len(raw)))
}
