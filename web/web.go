package web

import (
	"embed"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"net/http"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

//go:embed templates/*.html
var templates embed.FS

//go:embed static/*
var static embed.FS

// Page writes a page.
type Page func(w io.Writer) error

// Static returns the assets.
func Static() http.FileSystem {
	sub, err := fs.Sub(static, "static")
	if err != nil { // the directory is embedded
		return http.FS(static)
	}
	return http.FS(sub)
}

var functions = template.FuncMap{
	"share":   func(weight int) string { return fmt.Sprintf("%.4g%%", float64(weight)/100) },
	"percent": func(weight int) string { return fmt.Sprintf("%.4g %%", float64(weight)/100) },
	"ago":     ago,
	"mb":      func(n int64) string { return fmt.Sprintf("%.0f MB", float64(n)/1e6) },
	"short":   func(id string) string { return id[max(0, len(id)-8):] },
}

func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05")
}

var pages = template.Must(template.New("").Funcs(functions).ParseFS(templates, "templates/*.html"))

func page(name string, view any) Page {
	return func(w io.Writer) error { return pages.ExecuteTemplate(w, name, view) }
}

// LoginView is what the login page shows.
type LoginView struct{ Fault string }

// Login returns the login page.
func Login(v LoginView) Page { return page("login.html", v) }

// ModelRow is a model on the overview.
type ModelRow struct {
	Name        string
	Description string
	Route       registry.Route
}

// RunRow is a run on the overview.
type RunRow struct {
	registry.Run

	TemporalURL string
}

// OverviewView is what the overview shows.
type OverviewView struct {
	TemporalUI string
	Models     []ModelRow
	Workers    []registry.Lease
	Runs       []RunRow
}

// Overview returns the page of models with their live routes, the workers, and runs.
func Overview(v OverviewView) Page { return page("overview.html", v) }
