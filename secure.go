package plugin

import (
	"bytes"
	"hash"
	"io"
	"os"
	"sync"
)

// SecureConfig has the checksum of a plugin's binary. On Linux with /proc, the file
// that was checked is the file that runs, even if its path gets another file. (A script
// sees another path in $0.) On other systems, the other file runs. A file that is
// changed in place after the check runs on every system. Kill waits for the check.
//
// Several clients may use one SecureConfig.
type SecureConfig struct {
	// Checksum is the expected checksum.
	Checksum []byte
	// Hash computes the checksum, such as sha256.New().
	Hash hash.Hash
}

var hashMu sync.Mutex // guards every Hash

// Check reports whether a file has the expected checksum. It returns
// [ErrSecureConfigNoChecksum], [ErrSecureConfigNoHash], or an error of reading the file.
// Another checksum is not an error.
func (s *SecureConfig) Check(filePath string) (bool, error) {
	f, err := s.open(filePath)
	if err == ErrChecksumsDoNotMatch {
		return false, nil
	}
	_ = f.Close()
	return err == nil, err
}

// open opens a file if it has the expected checksum.
func (s *SecureConfig) open(path string) (*os.File, error) {
	switch {
	case len(s.Checksum) == 0:
		return nil, ErrSecureConfigNoChecksum
	case s.Hash == nil:
		return nil, ErrSecureConfigNoHash
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	hashMu.Lock()
	defer hashMu.Unlock()
	s.Hash.Reset()
	if _, err = io.Copy(s.Hash, f); err == nil && !bytes.Equal(s.Hash.Sum(nil), s.Checksum) {
		err = ErrChecksumsDoNotMatch
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
