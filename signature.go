package plugin

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
)

// This file is about what a method of an interface may look like, and as what its
// parameters and its result are sent.

var (
	typeOfNumber      = reflect.TypeFor[uint32]()
	typeOfReader      = reflect.TypeFor[io.Reader]()
	typeOfWriter      = reflect.TypeFor[io.Writer]()
	typeOfReadCloser  = reflect.TypeFor[io.ReadCloser]()
	typeOfWriteCloser = reflect.TypeFor[io.WriteCloser]()
)

// signature is the form of a method, or of a function that is a parameter.
type signature struct {
	takesContext bool         // as the first parameter
	params       []value      // behind the context; and a writer, if the result is a sequence
	result       value        // a struct{} for none
	returns      int          // how many results there are, with the error
	sent         reflect.Type // what is sent for params
	connects     bool         // a parameter or the result has a stream of its own
}

// value is a parameter or a result.
type value struct {
	reflect.Type
	kind     valueKind
	sent     reflect.Type // its type if it is plain, or else typeOfNumber
	function *signature   // if it is a function
}

// valueKind says how a value is sent.
type valueKind int

const (
	plainValue    valueKind = iota // as gob encodes it
	readerValue                    // as the number of a reader
	writerValue                    // as the number of a writer
	functionValue                  // as the number of a service with the method Call
	sequenceValue                  // as the number of a reader of its values, or to a writer
)

// newSignature returns the signature of a function, or an error that says why it cannot
// be called. The types outer have it as a parameter.
func newSignature(t reflect.Type, outer ...reflect.Type) (*signature, error) {
	if slices.Contains(outer, t) {
		return nil, fmt.Errorf("the function type %v contains itself", t)
	}
	if err := checkForm(t); err != nil {
		return nil, err
	}
	result, err := newResultValue(t, outer)
	if err != nil {
		return nil, err
	}
	s := &signature{result: result, returns: t.NumOut()}
	s.takesContext = t.NumIn() > 0 && t.In(0) == typeOfContext
	first := 0
	if s.takesContext {
		first = 1
	}
	for i := first; i < t.NumIn(); i++ {
		param, err := newParamValue(t.In(i), append(outer, t))
		if err != nil {
			return nil, err
		}
		s.params = append(s.params, param)
	}
	if result.kind == sequenceValue {
		s.params = append(s.params, value{Type: typeOfWriter, kind: writerValue, sent: typeOfNumber})
	}
	s.connects = result.kind != plainValue || slices.ContainsFunc(s.params, value.isNotPlain)
	s.sent = argumentType(s.params)
	return s, nil
}

// argumentCount returns how many arguments a caller passes behind the context.
func (s *signature) argumentCount() int {
	if s.result.kind == sequenceValue {
		return len(s.params) - 1
	}
	return len(s.params)
}

// checkForm returns an error if a function cannot be called, whatever its parameters.
func checkForm(t reflect.Type) error {
	n := t.NumOut()
	switch {
	case t.IsVariadic():
		return fmt.Errorf("%v is variadic", t)
	case n == 1 && isIterator(t.Out(0)):
		return nil
	case n == 0 || t.Out(n-1) != typeOfError:
		return fmt.Errorf("the last result of %v is not an error", t)
	case n > 2:
		return fmt.Errorf("%v returns more than one result and an error", t)
	}
	return nil
}

// newResultValue returns what a function returns beside the error, or its sequence.
func newResultValue(t reflect.Type, outer []reflect.Type) (value, error) {
	result := t.Out(0)
	if t.NumOut() == 1 && !isIterator(result) {
		return value{Type: typeOfNothing, sent: typeOfNothing}, nil
	}
	if !isIterator(result) {
		return newStreamOrPlainValue(result, typeOfReadCloser, typeOfWriteCloser)
	}
	if t.NumOut() == 2 {
		return value{}, fmt.Errorf("%v must be the only result: it ends with its own error", result)
	}
	v, err := newSequenceValue(result, outer)
	v.sent = typeOfNothing // the reply; the values go to the last parameter
	return v, err
}

// newParamValue returns a parameter of the last of the types functions, which is a
// parameter of the one before it, and so on. Or it returns an error that says why the
// parameter cannot be sent.
func newParamValue(t reflect.Type, functions []reflect.Type) (value, error) {
	if isIterator(t) {
		return newSequenceValue(t, functions[:len(functions)-1])
	}
	if t.Kind() != reflect.Func {
		return newStreamOrPlainValue(t, typeOfReader, typeOfWriter)
	}
	function, err := newSignature(t, functions...)
	return value{Type: t, kind: functionValue, sent: typeOfNumber, function: function}, err
}

// isIterator reports whether a type is an iter.Seq or iter.Seq2.
func isIterator(t reflect.Type) bool {
	return t.Kind() == reflect.Func && (t.CanSeq() || t.CanSeq2())
}

// newSequenceValue returns a sequence of a function, or an error that says why it cannot
// be sent. The types outer have the function as a parameter: then it has no sequences.
func newSequenceValue(t reflect.Type, outer []reflect.Type) (value, error) {
	yield := t.In(0)
	if yield.NumIn() != 2 || yield.In(1) != typeOfError {
		return value{}, fmt.Errorf("%v cannot be sent: use an iter.Seq2[T, error], which can say why it ends", t)
	}
	if len(outer) > 0 {
		return value{}, fmt.Errorf("%v cannot be sent: a callback takes and returns no sequences", t)
	}
	v := value{Type: t, kind: sequenceValue, sent: typeOfNumber}
	return v, checkPlain(v.element())
}

// newStreamOrPlainValue returns a value that may be a reader or writer of these types, or an
// error that says why it cannot be sent.
func newStreamOrPlainValue(t, reader, writer reflect.Type) (value, error) {
	switch {
	case t == reader:
		return value{Type: t, kind: readerValue, sent: typeOfNumber}, nil
	case t == writer:
		return value{Type: t, kind: writerValue, sent: typeOfNumber}, nil
	case t == typeOfContext || t == typeOfError:
		return value{}, errors.New("a context must be the first parameter, and an error the last result")
	case isOfPackageIO(t):
		return value{}, fmt.Errorf("%v cannot be sent, but %v and %v can", t, reader, writer)
	}
	return value{Type: t, sent: t}, checkPlain(t)
}

func isOfPackageIO(t reflect.Type) bool {
	return t.Kind() == reflect.Interface && t.PkgPath() == "io"
}

// checkPlain returns an error if values of a type cannot be sent, or would arrive without
// some of their parts.
func checkPlain(t reflect.Type) error {
	if err := checkParts(t, t.String(), make(map[reflect.Type]bool)); err != nil {
		return err
	}
	return checkGob(t)
}

// checkParts returns an error if a part of a type cannot be sent. Gob leaves some of them
// out, but the user expects what was set. path leads to t, and checked are the types that
// need not be looked at again.
func checkParts(t reflect.Type, path string, checked map[reflect.Type]bool) error {
	if checked[t] || encodesItself(t) {
		return nil
	}
	checked[t] = true
	switch t.Kind() {
	case reflect.Func, reflect.Chan:
		return fmt.Errorf("%s cannot be sent: it is a %v", path, t)
	case reflect.Interface:
		if isOfPackageIO(t) {
			return fmt.Errorf("%s cannot be sent: an %v must be a parameter or result itself", path, t)
		}
	case reflect.Pointer:
		return checkParts(t.Elem(), path, checked)
	case reflect.Slice, reflect.Array:
		return checkParts(t.Elem(), path+"[i]", checked)
	case reflect.Map:
		if err := checkParts(t.Key(), "a key of "+path, checked); err != nil {
			return err
		}
		return checkParts(t.Elem(), path+"[key]", checked)
	case reflect.Struct:
		return checkFields(t, path, checked)
	}
	return nil
}

// checkFields is checkParts for the exported fields of a struct.
func checkFields(t reflect.Type, path string, checked map[reflect.Type]bool) error {
	for i := range t.NumField() {
		field := t.Field(i)
		if !field.IsExported() {
			continue
		}
		if err := checkParts(field.Type, path+"."+field.Name, checked); err != nil {
			return err
		}
	}
	return nil
}

// argumentType returns the type that is sent for params: a single one as it is, or a
// struct.
func argumentType(params []value) reflect.Type {
	if len(params) == 1 {
		return params[0].sent
	}
	var fields []reflect.StructField
	for i, p := range params {
		fields = append(fields, reflect.StructField{Name: fmt.Sprintf("A%d", i), Type: p.sent})
	}
	return reflect.StructOf(fields)
}

// param returns parameter i in what is sent.
func (s *signature) param(sent reflect.Value, i int) reflect.Value {
	if len(s.params) == 1 {
		return sent
	}
	return sent.Field(i)
}

// element returns what a sequence yields.
func (v value) element() reflect.Type { return v.In(0).In(0) }

func (v value) isNotPlain() bool { return v.kind != plainValue }

// isNillable reports whether an untyped nil is one of the values.
func (v value) isNillable() bool {
	switch v.Type.Kind() {
	case reflect.Pointer, reflect.Interface, reflect.Slice, reflect.Map, reflect.Func:
		return true
	}
	return false
}

// checkGob returns an error if gob cannot send values of a type. An empty slice makes
// gob look at the type, without a value that its GobEncode might refuse.
func checkGob(t reflect.Type) (err error) {
	defer recoverTo(&err)
	var buf bytes.Buffer
	list := reflect.New(reflect.SliceOf(t))
	if err := gob.NewEncoder(&buf).EncodeValue(list.Elem()); err != nil {
		return err
	}
	return gob.NewDecoder(&buf).DecodeValue(list)
}

// checkNil returns an error for a nil pointer: gob would send a zero value for it.
func checkNil(v reflect.Value) error {
	for t := v.Type(); v.Kind() == reflect.Pointer; v = v.Elem() {
		if v.IsNil() {
			return fmt.Errorf("plugin: a nil %v cannot be sent as the only parameter or as the result", t)
		}
	}
	return nil
}
