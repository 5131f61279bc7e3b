package plugin

import (
	"encoding"
	"encoding/gob"
	"errors"
	"fmt"
	"reflect"
	"sync"
)

// This file looks at a value before gob encodes it. gob follows pointers without a limit:
// in a value that holds itself it never ends, and one that is too deep overflows the stack,
// which ends the process. A value that is too large fails only when all of it has been
// encoded. So these are found out before.

const (
	// maxDepth is how many pointers, slices, maps and interfaces may lie in each other.
	maxDepth = 100_000
	// suspiciousDepth is the depth from which on a value may be one that holds itself.
	suspiciousDepth = 1000
	// maxValues is how many values a message may have. One that has more has the same
	// pointers in it again and again, and gob encodes what they point to each time.
	maxValues = 1 << 28
	// maxMessage is gob's limit for the size of a message: 8 GiB, or 1 GiB on 32 bits.
	maxMessage = 1 << 30 << (^uint(0) >> 62)
	// maxPlainValues is how many values are looked at for their size alone.
	maxPlainValues = 1000
	// maxPointers is more than the pointers that any useful type begins with.
	maxPointers = 100
)

var (
	errTooDeep  = fmt.Errorf("it is nested more than %d levels deep", maxDepth)
	errTooLarge = fmt.Errorf("it is larger than %d GiB, the limit of gob: "+
		"send it through a reader or writer", maxMessage>>30)
	errTooMany     = errors.New("it has too many values, or the same ones too often")
	errHoldsItself = errors.New("it holds itself")
)

// inspect returns an error if gob must not encode v. If define is not nil, it is called
// with the types of the values in interfaces.
func inspect(v reflect.Value, define func(reflect.Type)) error {
	if !v.IsValid() {
		return nil
	}
	i := &inspection{define: define}
	return i.visit(v, contentOf(v.Type()))
}

// inspection is one walk through a value.
type inspection struct {
	define      func(reflect.Type)
	depth       int
	path        map[reference]bool // what holds the value that is visited, from suspiciousDepth on
	size        uint64             // the message is at least so large
	values      int
	plainValues int
}

// reference is a pointer, slice or map in a value.
type reference struct {
	t       reflect.Type
	pointer uintptr
	length  int // of a slice
}

func (i *inspection) visit(v reflect.Value, content *content) error {
	switch content.kind {
	case fixedContent:
		return nil
	case plainContent:
		i.plainValues++
		if i.plainValues > maxPlainValues {
			return nil
		}
	}
	i.values++
	if i.values > maxValues {
		return errTooMany
	}
	switch v.Kind() {
	case reflect.String:
		return i.grow(v.Len())
	case reflect.Array:
		return i.visitElements(v, content.element)
	case reflect.Struct:
		return i.visitFields(v, content.fields)
	}
	if v.IsNil() {
		return nil
	}
	if err := i.enter(v); err != nil {
		return err
	}
	err := i.visitInside(v, content)
	i.leave(v)
	return err
}

// visitInside visits what a pointer, slice, map or interface holds.
func (i *inspection) visitInside(v reflect.Value, content *content) error {
	switch v.Kind() {
	case reflect.Pointer:
		return i.visit(v.Elem(), content.element)
	case reflect.Interface:
		i.defineBase(v.Elem().Type())
		return i.visit(v.Elem(), contentOf(v.Elem().Type()))
	case reflect.Slice:
		return i.visitSlice(v, content.element)
	default:
		return i.visitMap(v, content)
	}
}

// enter is called before the contents of a pointer, slice, map or interface are visited.
func (i *inspection) enter(v reflect.Value) error {
	i.depth++
	if i.depth > maxDepth {
		return errTooDeep
	}
	if i.depth <= suspiciousDepth || v.Kind() == reflect.Interface {
		return nil
	}
	r := referenceTo(v)
	if i.path[r] {
		return errHoldsItself
	}
	if i.path == nil {
		i.path = make(map[reference]bool)
	}
	i.path[r] = true
	return nil
}

func (i *inspection) leave(v reflect.Value) {
	if i.depth > suspiciousDepth && v.Kind() != reflect.Interface {
		delete(i.path, referenceTo(v))
	}
	i.depth--
}

func referenceTo(v reflect.Value) reference {
	r := reference{t: v.Type(), pointer: v.Pointer()}
	if v.Kind() == reflect.Slice {
		r.length = v.Len()
	}
	return r
}

// grow adds to the size of the message.
func (i *inspection) grow(n int) error {
	i.size += uint64(n)
	if i.size > maxMessage {
		return errTooLarge
	}
	return nil
}

// defineBase calls define with the type that gob sends for t.
func (i *inspection) defineBase(t reflect.Type) {
	if i.define == nil {
		return
	}
	for range maxPointers { // type P *P has no end
		if t.Kind() != reflect.Pointer {
			break
		}
		t = t.Elem()
	}
	i.define(t)
}

func (i *inspection) visitSlice(v reflect.Value, element *content) error {
	if err := i.grow(v.Len()); err != nil { // each has a byte at least
		return err
	}
	if element.kind == fixedContent {
		return nil
	}
	return i.visitElements(v, element)
}

func (i *inspection) visitElements(v reflect.Value, element *content) error {
	for n := range v.Len() {
		if err := i.visit(v.Index(n), element); err != nil {
			return err
		}
	}
	return nil
}

func (i *inspection) visitMap(v reflect.Value, content *content) error {
	for entries := v.MapRange(); entries.Next(); {
		if err := i.visit(entries.Key(), content.key); err != nil {
			return err
		}
		if err := i.visit(entries.Value(), content.element); err != nil {
			return err
		}
	}
	return nil
}

func (i *inspection) visitFields(v reflect.Value, fields []contentField) error {
	for _, field := range fields {
		if err := i.visit(v.Field(field.index), field.content); err != nil {
			return err
		}
	}
	return nil
}

// contentKind says what gob may find in the values of a type.
type contentKind int

const (
	fixedContent contentKind = iota // nothing that makes one value larger than another
	plainContent                    // strings, slices and maps
	deepContent                     // interfaces, or values of the same type
)

// content is what gob may find in the values of a type.
type content struct {
	kind    contentKind
	key     *content       // of a map
	element *content       // of a pointer, array, slice or map
	fields  []contentField // of a struct: those with more than fixedContent
}

type contentField struct {
	index   int
	content *content
}

var contents sync.Map // reflect.Type to *content

func contentOf(t reflect.Type) *content {
	if known, ok := contents.Load(t); ok {
		return known.(*content)
	}
	c := findContent(t, make(map[reflect.Type]*content))
	contents.Store(t, c)
	return c
}

// findContent finds the content of a type. found has the types that have been found, and
// those that hold t with deepContent: if t holds one of them, they hold themselves.
func findContent(t reflect.Type, found map[reflect.Type]*content) *content {
	if c := found[t]; c != nil {
		return c
	}
	c := &content{kind: deepContent}
	found[t] = c
	if encodesItself(t) || encodesItself(reflect.PointerTo(t)) {
		c.kind = fixedContent
		return c
	}
	switch t.Kind() {
	case reflect.Interface:
		// deepContent
	case reflect.String:
		c.kind = plainContent
	case reflect.Pointer, reflect.Array:
		c.element = findContent(t.Elem(), found)
		c.kind = c.element.kind
	case reflect.Slice:
		c.element = findContent(t.Elem(), found)
		c.kind = max(plainContent, c.element.kind)
	case reflect.Map:
		c.key = findContent(t.Key(), found)
		c.element = findContent(t.Elem(), found)
		c.kind = max(plainContent, c.key.kind, c.element.kind)
	case reflect.Struct:
		c.findFields(t, found)
	default:
		c.kind = fixedContent
	}
	return c
}

func (c *content) findFields(t reflect.Type, found map[reflect.Type]*content) {
	kind := fixedContent
	for n := range t.NumField() {
		field := t.Field(n)
		if !field.IsExported() {
			continue
		}
		if of := findContent(field.Type, found); of.kind != fixedContent {
			kind = max(kind, of.kind)
			c.fields = append(c.fields, contentField{index: n, content: of})
		}
	}
	c.kind = kind
}

// encodesItself reports whether a type has a GobEncode or MarshalBinary, which gob calls
// instead of looking inside.
func encodesItself(t reflect.Type) bool {
	return t.Implements(reflect.TypeFor[gob.GobEncoder]()) ||
		t.Implements(reflect.TypeFor[encoding.BinaryMarshaler]())
}
