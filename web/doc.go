// Package web is the console: templates, assets and the views they show. It decides how things look; it reads nothing
// by itself and queries nobody.
package web
